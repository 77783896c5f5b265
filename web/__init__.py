"""What server.py serves: HTTP, WebSockets, the page."""
