"""Exports of public model configurations, small examples, and full-size graphs without weights."""
