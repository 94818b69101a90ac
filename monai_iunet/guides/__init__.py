"""The guides: Markdown pages that come with the package, and what reads them."""
