"""Benchmarks of dispatch and combine: cases, measurement, records, plots."""
