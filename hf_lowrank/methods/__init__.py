"""What is computed: the table of methods and their parts."""
