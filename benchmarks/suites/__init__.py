"""The benchmarks; each module has ``BENCHMARKS``, a tuple."""
