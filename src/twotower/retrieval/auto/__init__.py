"""`index=auto`: what may fit is proposed, built and measured, and a card tells of the choice."""
