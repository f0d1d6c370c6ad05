"""Shows what a command came to: tables, pages, JSON and JUnit files."""
