"""Makers of the pages and figures in docs/, from their JSON."""
