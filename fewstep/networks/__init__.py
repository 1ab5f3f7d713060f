"""Networks, from the ground up; each floor imports lower ones only (tests/test_rooms.py).

files, taps                          bytes on disk and on the hub; outputs of blocks. They know no network
encoders                             pixels, words and pictures to tensors
contract                             what a network and its configuration declare
lora, frozen, heads, tiny, analytic  adapters, frozen networks, discriminators, small networks
grid                                 weights of eight or four bits
families                             one file or folder for each; no family imports another one
weights, support                     addresses and conversion; the table of `fewstep ls networks`
roles                                which network is student, teacher, critic
"""
