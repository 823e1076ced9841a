"""Benchmarks: ``python -m bench --help``. They read the same OpSpecs as the tests and refuse to time a wrong kernel."""
