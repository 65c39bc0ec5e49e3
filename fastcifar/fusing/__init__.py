"""How `fastcifar.fuse` works: patterns say what can run as one operator, sequences and dataflow prove where it stands.

reading.py       what a module is and whether it can be taken over: by what its forward runs, not by its name
patterns.py      chains of layers that one operator replaces
sequences.py     groups that stand side by side in an `nn.Sequential`
dataflow.py      groups in any other forward, proven by symbolic tracing
armed.py         how the modules of such a forward run as one operator
substitution.py  the class of a module, exchanged and restored
plan.py          all groups of a model, and what to do to it
report.py        what was fused, and why the rest was not
"""
