"""int8 of whole models: trained for, made ready for, measured, compared with a file."""
