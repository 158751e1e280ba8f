"""The web pages: jobs, submit, live progress, results. Without JavaScript they work too, by reloading."""

from app.pages.routes import router

__all__ = ["router"]
