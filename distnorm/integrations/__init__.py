"""Frameworks that wrap models: where they meet distnorm. Each is imported only where it is used."""
