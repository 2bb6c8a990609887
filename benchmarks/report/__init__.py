"""The report of a comparison: one page that opens offline, Markdown, JSON and a picture."""
