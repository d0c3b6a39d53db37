"""The compact format: saved states without the values of inactive units. See README.md beside this file."""
