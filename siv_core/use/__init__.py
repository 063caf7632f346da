"""A model put to use: metrics, pictures, a user's own images."""
