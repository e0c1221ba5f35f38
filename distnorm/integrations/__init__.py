"""Integrations with training frameworks and launchers. Each framework is imported only if it is used."""
