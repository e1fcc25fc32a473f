"""Real brokers for a developer's machine: found, started in the background, watched and stopped."""
