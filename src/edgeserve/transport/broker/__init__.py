"""The transport contract over a message broker."""
