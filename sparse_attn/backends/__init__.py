"""Operations on tensors: one name and one signature each, in plain torch, Triton and Gluon for Hopper."""
