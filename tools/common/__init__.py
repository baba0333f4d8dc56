"""What several tools need, each thing once."""
