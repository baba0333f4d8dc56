"""Tools around train_gpt.py: `python -m tools.GROUP.NAME --help` says what each does.

tools.run is what a run uses itself; tools.data makes data; tools.reports reads logs; tools.measure measures;
tools.common holds what several of them need.
"""
