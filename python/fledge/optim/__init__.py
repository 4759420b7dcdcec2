"""Optimizers: Muon for the matrices of the blocks, AdamW for everything else, and schedules."""
