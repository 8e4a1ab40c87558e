"""The paper's claims, in miniature: methods x algorithms x seeds at an equal budget of reward queries."""
