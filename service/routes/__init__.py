"""HTTP only: parse, submit, render, answer."""
