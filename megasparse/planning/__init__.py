"""What a run costs on a cluster before it is booked: step time, memory, communication, energy, layouts that fit."""
