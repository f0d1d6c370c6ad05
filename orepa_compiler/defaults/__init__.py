"""What is chosen where nobody asked, from what is around a conv: may be wrong, never inexact."""
