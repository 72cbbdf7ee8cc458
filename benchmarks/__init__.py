"""Measurements of everdraft on this machine; ratios from one run, pairs in turn, medians."""
