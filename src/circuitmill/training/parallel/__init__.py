"""How the ranks of a training share its work, beside the model and not in it.

| module | what |
|---|---|
| layout | strategies: which tokens and which features a rank has |
| collectives | everything that is sent, and how many bytes that is |
| shards | sums and rankings over ranks, as `core.parts` asks for them |
| gradients | gradients and their norm over ranks |
| cut | a shard of a transcoder, and the whole from its shards |
| placement | a state in a checkpoint, whatever the layout it was saved from |
| fsdp | parameters, gradients and optimizer divided between steps |
| plan | what each strategy needs, and which one to take, before anything is started |
| census, activations, memory, payload | of which the plan is made: parameters, bytes held and sent |
| choose | the layout of a training that starts |
"""
