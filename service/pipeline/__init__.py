"""One image from options to response, the same for HTTP, the command line and bulk runs."""
