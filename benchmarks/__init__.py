"""
Benchmarks: what commsmgr costs next to the libraries below it, and to what else one could take.

``tox -e bench`` runs all of them, ``python -m benchmarks NAME ...`` some. A benchmark has contenders, among them
commsmgr; each run of a contender is a process of its own, against a server that is another process. They take turns,
for several rounds, in an order that rotates, so that what disturbs the machine disturbs all of them. A figure is the
median of the rounds; a ratio is the median of the ratios within each round. Figures are this machine's, ratios hold.

``measure`` runs and compares, ``report`` writes table, JSON and plot. Modules in ``suites`` have the benchmarks, in
``contenders`` what is measured, in ``servers`` what that talks to, in ``programs`` what is started as a whole. The
``guard`` counts instructions instead, of the work in ``counted``; ``.ci/run`` has it.
"""
