"""Tables, cards and plots of what was measured."""
