"""Evaluation by the ALOE protocol: subjects meet held-out personas; figures with intervals, tables and pictures."""
