"""Trials: what only a real kernel shows. Faults, attacks, kills and reloads under load, with a ledger that must add up.

Each module is one trial and gives `Verdict`s. The parts: `customers` (clients that give every request exactly one
outcome), `faults` and `proxy` (a link that breaks as one seed says), `gateway` (what is looked at from outside:
records, descriptors, memory, tasks), `books` (do the clients', the link's and the gateway's accounts agree?).
"""
