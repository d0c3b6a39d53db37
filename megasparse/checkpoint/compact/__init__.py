"""The compact format: saved states without the values of dead units. See README.md beside this file."""
