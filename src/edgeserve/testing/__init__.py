"""What edgeserve's own tests stand on, shipped for authors of engines, policies and tasks. Needs pytest."""

__all__: tuple[str, ...] = ()
