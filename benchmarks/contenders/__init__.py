"""What is measured: functions that do the work once and return a sample, each run in a process of its own."""
