"""What others wrote: texts made plain before anybody reads them, and files that are checked before they are used."""
