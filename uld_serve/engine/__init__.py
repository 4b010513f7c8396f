"""Requests: plan, schedule, run, sample, detokenize, finish. Knows no HTTP."""
