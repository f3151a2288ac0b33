"""The ledger: what five lectures on convolutional networks state, computed and judged.

`python -m experiments.claims` writes the report. One file per topic holds the claims; `ledger.py`
says what a claim and a verdict are.
"""
