"""What a request names, looked at before a job is made of it: models and texts, by their outsides only."""
