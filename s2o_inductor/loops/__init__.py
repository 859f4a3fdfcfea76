"""Python loops over experts, which no graph holds: found before capture and replaced, or named in the report.

`preparation.py` is `s2o_inductor.prepare`; `weights.py`, `probe.py` and `source.py` read a module's experts, find its
loop and write the method anew; `comparison.py` tells whether both agree; `breaks.py` names loops that broke a graph.
"""
