"""squall in the tools of others: one function a host, none of which is needed to import this."""

from squall.adapters.anemoi import anemoi as anemoi
from squall.adapters.earth2studio import earth2studio as earth2studio
from squall.adapters.neuraloperator import neuraloperator as neuraloperator
from squall.adapters.pina import pina as pina
from squall.adapters.the_well import the_well as the_well
