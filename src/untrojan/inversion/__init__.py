"""The one engine that finds triggers by gradient, many class pairs at once."""
