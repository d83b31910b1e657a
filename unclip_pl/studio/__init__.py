"""The studio: one model for many people, behind a page in the browser and an API."""
