"""What training adds to a network: initial weights, keyed dropout, gradient checkpointing."""
