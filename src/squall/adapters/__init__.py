"""squall in the tools of others: one module a host, none of which is needed to import it."""

from squall.adapters.earth2studio import earth2studio as earth2studio
