from datasets import load_dataset
from rewards_of_mine import right
from trl import GRPOConfig, GRPOTrainer

PROMPTS, GENERATIONS = 4, 4

dataset = load_dataset("json", data_files="chat.jsonl", split="train")
held_out = load_dataset("json", data_files="heldout.jsonl", split="train")
options = {"num_generations": GENERATIONS, "generation_batch_size": PROMPTS * GENERATIONS}
args = GRPOConfig(
    output_dir="gspo/out",
    per_device_train_batch_size=GENERATIONS,
    importance_sampling_level="sequence",
    loss_type="grpo",
    epsilon=3e-4,
    epsilon_high=4e-4,
    num_iterations=2,
    adam_beta2=0.99,
    max_grad_norm=0.2,
    max_completion_length=24,
    top_p=0.95,
    seed=7,
    **options,
)

if __name__ == "__main__":
    GRPOTrainer("./model", right, args=args, train_dataset=dataset, eval_dataset=held_out).train()
