"""Ground floor: what every room may use. Nothing here knows about models, data or training."""
