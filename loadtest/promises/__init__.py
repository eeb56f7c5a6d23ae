"""The three promises and two more, measured from outside: what a gateway must keep, as numbers that can break.

Each module measures one thing with plain blocking clients and gives `Verdict`s. Nothing here knows which gateway it
measures; what only one gateway can be asked for (a lease queue of length one) is skipped for others, with the reason.
"""
