"""Chooses where nobody asked, by what is around a conv: may be wrong, never inexact."""
