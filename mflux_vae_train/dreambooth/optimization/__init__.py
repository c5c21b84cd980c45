"""What is trained, on which loss, with which optimizer."""
