"""What models are asked, one module for each kind of task."""
