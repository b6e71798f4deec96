"""Requests and replies as types: what is accepted or refused by name, and the schemas of /openapi.json."""
